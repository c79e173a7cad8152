"""Which ranks train which shard; barriers with a timeout, collectives, and process groups."""
