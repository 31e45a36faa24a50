"""`gkp bench --suite edge`: what splitting a network over devices buys, measured on one Linux machine. Workers are real
processes, on cores of their own, over links that are what they are (loopback) or shaped; everything else is predicted, and
called so."""
