"""The flight recorder: all that an engine is told and decides, in files that replay."""
