"""Rules over metrics and events, and who is told when one holds. See README.md."""
