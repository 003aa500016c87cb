"""`python -m services.gateway`: the gateway as a process of its own, over the servers that the settings name."""

from services.gateway.server import main

if __name__ == "__main__":
    main()
