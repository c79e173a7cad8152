"""What a run would do, need and take, before it is begun."""
