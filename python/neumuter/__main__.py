from neumuter.cli import main

main()
