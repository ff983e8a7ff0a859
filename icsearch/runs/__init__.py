"""What runs and evaluations leave behind: events with their schema, the record they replay to, the folder."""
