"""What this machine has, and where a bundle's nodes and weights run.

python examples/device_report.py phi-4-mini
"""

import sys

import edgephi
from edgephi.devices.detect import detect
from edgephi.devices.profile import match_profiles

machine = detect()
print(f"{machine.cpu.name}, {machine.cpu.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, power: {machine.power}")
for device in machine.devices:
    print(f"device   {device.provider}: {device.kind}")
for match in match_profiles(machine):
    if match.matches:
        print(f"profile  {match.profile.name} ({match.profile.evidence})")

with edgephi.load(sys.argv[1]) as model:
    for part in model.placement.providers:
        print(f"runs on  {part.provider}: {part.nodes} nodes, {part.weight_bytes / 1e6:.1f} MB of weights")
