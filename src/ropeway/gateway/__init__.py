"""Several models behind one address: routes, deployments, balancing, retries."""
