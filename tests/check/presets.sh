# what: core and layers by clang++ without sanitizers, and every header alone
# takes: 5 minutes
build_and_test clang
