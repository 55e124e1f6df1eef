"""The optwatch server: runs, heartbeats, events and the pages people read."""
