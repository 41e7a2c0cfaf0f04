"""What the commands do that need no room of their own. Nothing here prints or exits."""
