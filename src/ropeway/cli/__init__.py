"""The command line: one file per verb. Only this floor knows every other one."""
