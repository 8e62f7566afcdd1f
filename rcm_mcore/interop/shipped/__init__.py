"""Files that exported pipelines carry; they import nothing of this project."""
