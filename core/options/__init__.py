"""What can be asked for: declared once, as structs, without anything that converts. The command line, its help, the checks
and gkp.convert derive from them."""
