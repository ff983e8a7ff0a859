"""What serving engines read: a pattern written for one of them, and what one of them runs read back as a pattern."""
