"""What a conversion found, shown: in words, as terminal tables, as an HTML page. Knows manifests, no
converter."""
