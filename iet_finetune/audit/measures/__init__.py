"""What an audit measures, from images, features, losses and predictions."""
