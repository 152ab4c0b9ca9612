"""What all verbs share: options, output for people and programs, and the process around them."""
