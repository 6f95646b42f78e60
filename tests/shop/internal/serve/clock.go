package serve

import (
	"context"
	"encoding/json"
	"errors"
	"net"
)

// startClock answers every UDP packet with a line that says who answered, then the packet.
func startClock(s *Service, listen []string) error {
	conn, err := net.ListenPacket("udp", listen[0])
	if err != nil {
		return err
	}
	s.Addrs = append(s.Addrs, conn.LocalAddr().String())
	s.onStop(func(context.Context) { conn.Close() })
	line, err := json.Marshal(s.self.Answer("UDP", ""))
	if err != nil {
		return err
	}
	line = append(line, '\n')
	go func() {
		packet := make([]byte, 64<<10)
		for {
			n, from, err := conn.ReadFrom(packet)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				conn.WriteTo(append(line[:len(line):len(line)], packet[:n]...), from)
			}
		}
	}()
	return nil
}
