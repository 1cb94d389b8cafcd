"""Tables and figures out of run folders. This room reads files only and never imports torch."""
