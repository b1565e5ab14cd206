"""The parts of the command line; `effvit.cli` picks one by verb and imports nothing else."""
