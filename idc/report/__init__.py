"""From run folders to the paper's tables and a page to look at."""
