"""What builds, executes and checks the book; the package itself needs none of it."""
