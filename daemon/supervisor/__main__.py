"""`python -m ebbflow.daemon.supervisor`."""

from .main import main

raise SystemExit(main())
