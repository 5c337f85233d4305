"""Generated wire types of the public contract. Applications use `sdclient` instead."""
