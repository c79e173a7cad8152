"""Images, captions and what is done to them before training; import the modules, this file holds nothing."""
