package controller

import (
	strongroomv1 "strongroom/api/strongroom/v1"
	"strongroom/internal/control/inventory"
	"strongroom/internal/crypto/parcel"
	"strongroom/internal/errs"
	"strongroom/internal/keys/keyprovider/standard"
)

// checkHostAccess checks how hosts get the keys of a provider whose key server
// knows the controller by that client method.
func checkHostAccess(access, clientMethod, name string) error {
	switch access {
	case "", inventory.HostsBrokered:
		return nil
	case inventory.HostsDirect:
		if clientMethod == inventory.ClientOfCA {
			// Its private key is the one by which hosts know the controller.
			return errs.New(errs.InvalidState, "hosts cannot ask the key server: it knows the controller by the controller's own certificate, which is given to no one").
				WithHint("strongroom provider set-client %s --method self-signed, or leave the host access brokered", name)
		}
		return nil
	}
	return errs.New(errs.Invalid, "%.32q is no host access", access).WithHint("it is brokered or direct")
}

// keyServerAccess is what a host needs to ask the key servers of a provider
// itself.
func (c *Controller) keyServerAccess(h inventory.Host, p inventory.Provider) (*strongroomv1.KeyServerAccess, error) {
	s := p.Standard
	out := &strongroomv1.KeyServerAccess{User: s.User, Proxy: s.Proxy, TimeoutSeconds: s.TimeoutSeconds, Client: s.Client}
	for _, server := range s.Servers {
		out.Servers = append(out.Servers, &strongroomv1.TrustedServer{Address: server.Address, Fingerprint: server.Fingerprint})
	}
	if s.Wrapping != nil {
		for _, k := range s.Wrapping.Replaced {
			if !k.Ended.IsZero() {
				out.EndedKeys = append(out.EndedKeys, k.KeyID)
			}
		}
	}
	secrets, err := c.keys.credentials(p.Name)
	if err != nil {
		return nil, err
	}
	defer secrets.Close()
	given := standard.Credentials{Password: secrets.Password}
	if len(s.Client) > 0 {
		if given.ClientKey, err = keyOf(s.Client, secrets); err != nil {
			return nil, err
		}
	}
	blob, err := standard.MarshalCredentials(map[string]standard.Credentials{p.Name: given})
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	out.Parcel, err = parcel.Seal(h.ParcelPublicKey, standard.AccessContext(controllerName, h.ID, p.Name), blob)
	return out, err
}
