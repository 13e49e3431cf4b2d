"""What an optimizer step consumes and does."""
