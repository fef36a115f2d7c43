"""What the lifecycle needs of volumes: nothing yet. Servers boot from images; block devices of other kinds are refused by
the API (400). The contract comes with the first implementation."""
