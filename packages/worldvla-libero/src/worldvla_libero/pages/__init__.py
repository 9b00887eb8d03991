"""Parts of the pages for people: HTML without network or JavaScript, and panels drawn with matplotlib."""
