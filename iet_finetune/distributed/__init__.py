"""Which ranks train which shard, and how ranks wait for each other and exchange tensors."""
