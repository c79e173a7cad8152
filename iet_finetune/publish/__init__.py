"""What a run leaves: the pipeline, its model card, and the upload to the Hub."""
