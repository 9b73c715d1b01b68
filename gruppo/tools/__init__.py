"""What a model can use while it completes a prompt: Python in a sandbox, and environments of several turns."""
