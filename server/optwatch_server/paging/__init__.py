"""Pages on their way to Alertmanager, and alerts on their way back."""
