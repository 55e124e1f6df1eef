"""What is known of runs: their lives, beats, events and recordings, who is late, and what they cost."""
