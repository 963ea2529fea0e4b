"""What a run will take before it starts: memory, operations, hours, disk (`idc plan`)."""
