from fastrl.cli.main import run

run()
