"""What an audit says: its metrics in words, the verdict, pages and comparisons."""
