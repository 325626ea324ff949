from tests.mutation.running import main

main()
