// Package args parses command lines whose flags and arguments come in any order.
package args

import (
	"flag"
	"strings"
)

// Parse parses args and returns what is not a flag.
func Parse(flags *flag.FlagSet, args []string) ([]string, error) {
	var plain []string
	for {
		if err := flags.Parse(args); err != nil {
			return nil, err
		}
		if flags.NArg() == 0 {
			return plain, nil
		}
		plain = append(plain, flags.Arg(0))
		args = flags.Args()[1:]
	}
}

// List is a flag that may be repeated.
type List []string

func (l *List) String() string { return strings.Join(*l, ",") }

// Set adds one value.
func (l *List) Set(value string) error {
	*l = append(*l, value)
	return nil
}
