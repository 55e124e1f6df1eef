"""What is answered over HTTP: the API, the pages for people, and refusals that say what to do."""
