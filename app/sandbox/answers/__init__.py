"""What the offline upstream answers: a file for each kind of call, in the shapes that real providers use."""
