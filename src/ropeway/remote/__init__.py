"""An engine in a process of its own: started, spoken to over a socket, watched, and ended."""
