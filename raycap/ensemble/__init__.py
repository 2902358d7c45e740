"""`raycap ensemble`: several bundles made one. No Ray here."""
