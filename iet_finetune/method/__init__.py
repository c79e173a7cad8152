"""The paper: objective, anti-gradient control, merging, shards, schedule and random draws; torch and numpy alone."""
