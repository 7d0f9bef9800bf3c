"""Child processes of the commands (demo, bench): their output as events, and none outlives its owner."""
