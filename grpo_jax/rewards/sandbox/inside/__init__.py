"""What runs inside of the sandbox: it imports the standard library and these modules alone."""
