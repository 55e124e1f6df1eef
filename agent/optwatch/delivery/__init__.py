"""The way to the server: messages kept on disk until they are taken, and uploads of black boxes."""
