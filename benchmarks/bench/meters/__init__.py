"""What the machine itself counts: energy, memory, processors, temperature."""
