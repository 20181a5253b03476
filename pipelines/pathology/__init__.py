"""From slide files to slide classifiers."""
