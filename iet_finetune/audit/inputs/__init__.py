"""What an audit looks at: the model, the training images, and the generated ones."""
