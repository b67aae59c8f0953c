from neumuter.cli.app import main

main()
