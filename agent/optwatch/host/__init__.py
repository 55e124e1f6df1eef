"""What runs on the host thread: from an arrived row to a record, its judgement and its sinks."""
